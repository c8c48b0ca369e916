"""What is the method, and how does the loop over its steps run?"""
