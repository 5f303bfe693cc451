"""SimDA text-to-video adapters as a batch pipeline on Ray."""

import os

# At the start of every command and every worker it would warn of torchvision, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
