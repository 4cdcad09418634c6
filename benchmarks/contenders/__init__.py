"""The contenders: programs that do the same work, each in a process of its own.

Each module here whose name does not begin with an underscore is a program, `python -m benchmarks.contenders.NAME`. It
reads requests from its standard input and answers them on its standard output, as docs/benchmarks.md says under “Other
programs”. Any program that does so can be measured too, with `--contender NAME=COMMAND`. All times are in seconds,
measured by the program itself around the work alone.
"""
