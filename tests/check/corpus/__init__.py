"""Rules that the auditor is judged by: wrong ones, right ones that look suspicious, surrogates."""
