"""What is submitted: parse, set up logging, call one pipeline function."""
