"""The command line: one file a subcommand, with its arguments (`add`) and its work (`run`).

These files import nothing heavy at their top, so that help and wrong arguments are answered at once; `run` imports what
it needs.  Exceptions are the files that only work is done with: `inputs` and `evaluations`.
"""
