"""The process: watch, dispatch, run, report."""
