"""What is done to pixels, and what is the predictor told of it?"""
