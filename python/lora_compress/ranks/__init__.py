"""Which rank every tensor gets: what can be asked (`choice`), what a tensor's error is worth (`weights`), and the plan
that answers (`plan`).
"""
