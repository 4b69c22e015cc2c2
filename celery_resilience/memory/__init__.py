"""A child that grew is recycled between tasks; a run that explodes is failed alone."""
