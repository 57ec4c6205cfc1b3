"""What ``studies/convert.py`` measures of converted models."""
