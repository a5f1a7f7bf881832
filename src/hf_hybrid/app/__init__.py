"""A page to try a checkpoint in a browser: the functions behind its buttons, the page itself, and the files of a Hub Space.

Only `page` needs Gradio.
"""
