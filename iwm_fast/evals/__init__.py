"""What is a trained model worth? One folder for each kind of evaluation."""
