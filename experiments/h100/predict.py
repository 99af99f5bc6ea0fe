"""stub"""
def predicted_round(*a):
    return None
