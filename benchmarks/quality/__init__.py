"""Quality benchmark: which merge keeps the skills of experts whose objectives partly conflict?"""
