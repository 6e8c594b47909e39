"""Commands with commands of their own, and what all of them share."""
