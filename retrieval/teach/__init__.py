"""Teaching by marks: lessons, what is known from them, what they may change."""
