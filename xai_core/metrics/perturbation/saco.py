"""SaCo: does salience order and size agree with the effect of groups of pixels?"""
