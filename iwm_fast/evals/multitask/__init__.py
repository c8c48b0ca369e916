"""Can one finetuned predictor serve several tasks at once?"""
