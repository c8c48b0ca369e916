"""How is one optimiser step made: backward, clip, update, by PyTorch alone or by DeepSpeed?"""
