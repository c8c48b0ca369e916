"""What is one process of a launch? Its rank, its signals, its locks, and how its errors reach the user."""
