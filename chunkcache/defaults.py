"""What is used where nothing is said, for modules that must not import a model's libraries to know it."""

DEFAULT_POLICY = "query:later=0.2"
