"""``hamt compare``: a model beside baselines."""
