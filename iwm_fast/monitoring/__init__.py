"""Which numbers does a run give about itself: metrics, times, FLOPs, memory, signs of collapse?"""
