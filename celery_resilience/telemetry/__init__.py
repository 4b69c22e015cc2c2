"""What happened, for whoever looks: observers of every room."""
