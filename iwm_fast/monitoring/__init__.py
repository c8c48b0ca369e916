"""What does a run report about itself: metrics, step times, FLOPs, memory, signs of collapse?"""
