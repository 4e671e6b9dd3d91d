"""icdctl"""
