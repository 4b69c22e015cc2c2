"""What is tried again, when, how often, and until when."""
