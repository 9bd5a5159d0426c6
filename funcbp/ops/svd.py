"""The singular value decomposition, with gradients that are finite at ties and zeros.

    a_ij = sum_k u_ik s_k v_jk        k = min(m, n) columns, orthonormal; s descending

Backward. With c = u^T da v, ds_k = c_kk, du = u p and dv = v q, where p and q are antisymmetric.
c + c^T and c - c^T of u p s + ds + s (v q)^T give, off the diagonal, with f_kl = 1 / (s_l - s_k)
and h_kl = 1 / (s_k + s_l),
    p = (f * (c + c^T) + h * (c - c^T)) / 2        q = (f * (c + c^T) - h * (c - c^T)) / 2
So with x = u^T du - du^T u and y = v^T dv - dv^T v
    da = u (diag(ds) + (f * (x + y) + h * (x - y)) / 2) v^T
Where m > n, du also has a part outside of the columns of u, (1 - u u^T) da v / s, so
    da += (1 - u u^T) (du / s) v^T        and likewise with v where n > m
The columns that `full_matrices` adds, b, turn against it: db = -u (u^T da^T b) in the same letters.

Saves: a, an argument, and the factors u, s and v, also where only s is asked for.
Edge:  equal singular values, and two that are zero, have no single vectors: f, h and 1 / s are 0
       where their denominator is at most 16 eps max_k s_k. That is exact for what does not change
       as singular values cross: sums over all of f(s_k), projections on all vectors of a repeated
       value. It is not for u f(s) v^T, whose derivative between two vectors of one value no rule
       can find in du, ds and dv. At s = 0 the gradient of sum_k s_k is u v^T, a subgradient. Signs
       are LAPACK's. Autodiff of jnp.linalg.svd gives nan at ties.
Dtype: computes in float32 or wider, returns a's dtype.
Ref:   Townsend, 2016; Giles, 2008, section 3.2.
"""
