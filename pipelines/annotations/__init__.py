"""Which label or segmentation map does a sample have?"""
