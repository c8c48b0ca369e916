"""Multitask evaluation: can one finetuned predictor solve several tasks?"""
