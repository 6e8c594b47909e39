"""Which modules carry LoRA best: the runs behind docs/study.md, their raw lines and the tables made from them."""
