"""How are the pixels of the two views changed, and which action describes the change to the predictor?"""
