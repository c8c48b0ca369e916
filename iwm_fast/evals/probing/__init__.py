"""What do frozen features tell: k nearest neighbours, a linear and an attentive probe?"""
