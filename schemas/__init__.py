"""What the documents and messages are: names, types, defaults and codes of the published interface."""
