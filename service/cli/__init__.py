"""`dltask`: the command line. Only this package prints.

Answers go to stdout, everything else to stderr. Imports that cost time stand inside the commands: `dltask --help` and
shell completion must not wait for a database driver.
"""
