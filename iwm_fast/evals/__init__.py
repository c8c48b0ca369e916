"""What a trained world model is worth: each task with its chance level or control."""
