//! Text that a peer sends or is sent, within a bound of bytes.

/// The longest beginning of `text` of at most `max` bytes that ends between two characters.
pub(crate) fn beginning(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// `bytes` as text of at most `max` bytes. What is not UTF-8 is replaced, and takes up to three times its bytes then.
pub(crate) fn lossy(bytes: &[u8], max: usize) -> String {
    let mut text = String::from_utf8_lossy(bytes).into_owned();
    text.truncate(beginning(&text, max).len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_is_not_cut() {
        assert_eq!(beginning("aé", 2), "a");
        assert_eq!(beginning("aé", 3), "aé");
        assert_eq!(beginning("é", 1), "");
        assert_eq!(beginning("abc", 9), "abc");
    }

    #[test]
    fn replaced_bytes_stay_within_the_bound() {
        assert_eq!(lossy(&[0xff; 5], 5), "\u{fffd}");
        assert_eq!(lossy(b"a\xffb", 9), "a\u{fffd}b");
    }
}
