//! Explicit little-endian layouts: nothing depends on padding or on the host's byte order.

use super::limits;
use crate::text;

/// A message that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The body ends inside a field.
    #[error("message ends inside its {field}")]
    Short {
        /// What was being read.
        field: &'static str,
    },
    /// A length or count passes its bound.
    #[error("{field} of {value} passes the bound of {max}")]
    Bound {
        /// What was being read.
        field: &'static str,
        /// The peer's value.
        value: u64,
        /// The bound.
        max: u64,
    },
    /// A value has no meaning.
    #[error("{field} has no meaning: {value:#x}")]
    Meaning {
        /// What was being read.
        field: &'static str,
        /// The peer's value.
        value: u64,
    },
    /// Bytes are left over.
    #[error("{0} bytes left over behind the message")]
    Trailing(usize),
}

/// Reads fields off a message body.
#[derive(Debug)]
pub struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    /// A decoder over a whole body.
    #[must_use]
    pub const fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`CodecError::Short`].
    pub fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], CodecError> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(CodecError::Short { field })?;
        self.0 = tail;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// [`CodecError::Short`].
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], CodecError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(CodecError::Short { field })?;
        self.0 = tail;
        Ok(*head)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`CodecError::Short`].
    pub fn u8(&mut self, field: &'static str) -> Result<u8, CodecError> {
        Ok(self.array::<1>(field)?[0])
    }

    /// Two bytes.
    ///
    /// # Errors
    /// [`CodecError::Short`].
    pub fn u16(&mut self, field: &'static str) -> Result<u16, CodecError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    /// Four bytes.
    ///
    /// # Errors
    /// [`CodecError::Short`].
    pub fn u32(&mut self, field: &'static str) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// [`CodecError::Short`].
    pub fn u64(&mut self, field: &'static str) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// A length (u32) and as many bytes, at most `max`.
    ///
    /// # Errors
    /// [`CodecError::Short`], [`CodecError::Bound`].
    pub fn blob(&mut self, max: usize, field: &'static str) -> Result<&'a [u8], CodecError> {
        let len = bounded(u64::from(self.u32(field)?), max, field)?;
        self.bytes(len, field)
    }

    /// A length and as many bytes of text, at most [`limits::STRING_MAX`] bytes; invalid UTF-8 is replaced, not
    /// refused: it is only shown.
    ///
    /// # Errors
    /// [`CodecError::Short`], [`CodecError::Bound`].
    pub fn string(&mut self, field: &'static str) -> Result<String, CodecError> {
        Ok(text::lossy(self.blob(limits::STRING_MAX, field)?, limits::STRING_MAX))
    }

    /// A count (u32) and as many elements, at most [`limits::LIST_MAX`]. Nothing is reserved ahead, so a
    /// count alone costs no memory.
    ///
    /// # Errors
    /// [`CodecError::Bound`] and what `each` returns.
    pub fn list<T>(
        &mut self,
        field: &'static str,
        mut each: impl FnMut(&mut Self) -> Result<T, CodecError>,
    ) -> Result<Vec<T>, CodecError> {
        let count = bounded(u64::from(self.u32(field)?), limits::LIST_MAX, field)?;
        (0..count).map(|_| each(self)).collect()
    }

    /// Ends the message: nothing may be left.
    ///
    /// # Errors
    /// [`CodecError::Trailing`].
    pub const fn end(self) -> Result<(), CodecError> {
        if self.0.is_empty() { Ok(()) } else { Err(CodecError::Trailing(self.0.len())) }
    }
}

/// `value` as a length, if it is within `max`.
pub(crate) fn bounded(value: u64, max: usize, field: &'static str) -> Result<usize, CodecError> {
    match usize::try_from(value) {
        Ok(len) if len <= max => Ok(len),
        _ => Err(CodecError::Bound { field, value, max: max as u64 }),
    }
}

/// Writes fields into a message body.
#[derive(Debug, Default)]
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// Raw bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Length and bytes; what passes `u32` is our own bug, and is cut to keep the frame well formed.
    pub fn blob(&mut self, bytes: &[u8]) -> &mut Self {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.u32(len).bytes(&bytes[..len as usize])
    }

    /// Length and text, cut to [`limits::STRING_MAX`] bytes between two characters.
    pub fn string(&mut self, text: &str) -> &mut Self {
        self.blob(text::beginning(text, limits::STRING_MAX).as_bytes())
    }

    /// Count and elements, cut to [`limits::LIST_MAX`].
    pub fn list<T>(&mut self, items: &[T], mut each: impl FnMut(&mut Self, &T)) -> &mut Self {
        let items = &items[..items.len().min(limits::LIST_MAX)];
        self.u32(u32::try_from(items.len()).unwrap_or(u32::MAX));
        for item in items {
            each(self, item);
        }
        self
    }

    /// The body.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8]) -> String {
        let mut body = Encoder::default();
        body.blob(bytes);
        Decoder::new(&body.finish()).string("text").unwrap()
    }

    #[test]
    fn text_stays_within_its_bound_and_can_be_sent_on() {
        let text = decoded(&vec![0xff; limits::STRING_MAX]);
        assert!(text.len() <= limits::STRING_MAX, "{}", text.len());
        assert_eq!(decoded(text.as_bytes()), text);
    }

    #[test]
    fn text_is_cut_between_two_characters() {
        let mut body = Encoder::default();
        body.string(&format!("a{}", "é".repeat(limits::STRING_MAX)));
        let text = Decoder::new(&body.finish()).string("text").unwrap();
        assert_eq!(text.len(), limits::STRING_MAX - 1);
        assert!(!text.contains('\u{fffd}'));
    }
}
