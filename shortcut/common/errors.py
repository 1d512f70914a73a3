"""The one error of this package that a user can mend."""


class ShortcutError(Exception):
    """Something the user can mend, said in one line: what was asked, what is possible, what to do.

    Anything else that is raised is a defect of this package and keeps its traceback.
    """
