"""Which label or segmentation map belongs to a sample?"""
