"""The methods in training frameworks other than transformers' Trainer."""
