"""What are encoder and predictor worth when they are finetuned for classification?"""
