"""Pixel decoder: what do tokens say about the pixels of an image?"""
