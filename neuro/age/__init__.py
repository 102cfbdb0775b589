"""From a brain to an age with its interval."""
