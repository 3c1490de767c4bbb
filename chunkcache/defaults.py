"""What is used where nothing is said, for modules that must not import a model's libraries to know it."""

DEFAULT_POLICY = "query:later=0.2"

# What `serve` and vLLM begin with: requests wait for one another there, and a short prompt is not looked at.
SERVED_POLICY = "query:least=2048"
