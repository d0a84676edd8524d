"""PEFT's places for names that scripts import from below `peft.utils`."""
