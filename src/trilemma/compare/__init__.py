"""Fair comparisons: a study expands to plain runs, they are trained and measured, a report is drawn from their files.

The three steps are separate on purpose. `expand` turns a `StudyConfig` into resolved `RunConfig`s; `execute` trains
and measures them, one run directory each, and can be killed at any moment; `report` is a pure function of what lies
on disk.
"""
