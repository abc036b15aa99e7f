//! What `criu --version` prints, and which page-server header layout that CRIU uses.

use thiserror::Error;

use super::page_server::HeaderLayout;

/// First release with the 32-byte page-server header and 64-bit page counts in pagemaps.
const FIRST_WIDE: CriuVersion = CriuVersion { major: 4, minor: 2, sublevel: 0 };
/// Oldest release from whose tag a development build may already have the wide header.
const LAST_COMPACT: CriuVersion = CriuVersion { major: 4, minor: 1, sublevel: 0 };

/// Why the version of a CRIU, or its header layout, could not be told.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VersionError {
    /// No line of the form `Version: MAJOR.MINOR[.SUBLEVEL]`.
    #[error("find no line \"Version: MAJOR.MINOR\" in the output of `criu --version`: is it CRIU?")]
    NoVersion,
    /// A build between two releases that have different layouts.
    #[error(
        "tell the header layout of a development build of CRIU {version} ({git_id}): releases up to 4.1.1 use 24 \
         bytes, from 4.2 on 32; take it from the images or say compact or wide"
    )]
    Ambiguous {
        /// Version of the release it was built after.
        version: CriuVersion,
        /// What the `GitID:` line says.
        git_id: String,
    },
}

/// A CRIU release. Ordered as releases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CriuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number, 0 if there is none.
    pub sublevel: u32,
}

impl std::fmt::Display for CriuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.sublevel > 0 { write!(f, ".{}", self.sublevel) } else { Ok(()) }
    }
}

impl CriuVersion {
    /// Reads the `Version:` line of the output of `criu --version`. Text behind the numbers (`-dev`) is ignored.
    ///
    /// # Errors
    /// [`VersionError::NoVersion`] if there is no such line.
    pub fn parse(output: &str) -> Result<Self, VersionError> {
        let text = line_after(output, "Version:").ok_or(VersionError::NoVersion)?;
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let mut numbers = text.get(..end).unwrap_or_default().split('.').map(str::parse::<u32>);
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
            return Err(VersionError::NoVersion);
        };
        let sublevel = numbers.next().and_then(Result::ok).unwrap_or(0);
        Ok(Self { major, minor, sublevel })
    }
}

/// The header layout of the CRIU whose `criu --version` printed `output`.
///
/// # Errors
/// [`VersionError`] if the version is missing, or is a development build between two layouts.
pub fn header_layout(output: &str) -> Result<HeaderLayout, VersionError> {
    let version = CriuVersion::parse(output)?;
    if version >= FIRST_WIDE {
        return Ok(HeaderLayout::Wide);
    }
    // `git describe` of a build that is not a tag: v4.1-123-gabcdef. The layout changed between two tags.
    let git_id = line_after(output, "GitID:").unwrap_or_default();
    if version >= LAST_COMPACT && git_id.contains("-g") {
        return Err(VersionError::Ambiguous { version, git_id: git_id.to_owned() });
    }
    Ok(HeaderLayout::Compact)
}

fn line_after<'a>(output: &'a str, label: &str) -> Option<&'a str> {
    output.lines().find_map(|line| line.trim().strip_prefix(label)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_up_to_4_1_1_are_compact() {
        for output in ["Version: 4.1.1", "Version: 4.1\nGitID: v4.1\n", "Version: 3.17.1\n", "Version: 3.19"]
        {
            assert_eq!(header_layout(output), Ok(HeaderLayout::Compact), "{output}");
        }
    }

    #[test]
    fn releases_from_4_2_are_wide() {
        for output in
            ["Version: 4.2", "Version: 4.2\nGitID: v4.2-7-gabc\n", "Version: 4.2-dev", "Version: 10.0.1"]
        {
            assert_eq!(header_layout(output), Ok(HeaderLayout::Wide), "{output}");
        }
    }

    #[test]
    fn a_build_between_the_layouts_is_ambiguous() {
        let error = header_layout("Version: 4.1\nGitID: v4.1-123-g0123456\n").unwrap_err();
        assert!(matches!(error, VersionError::Ambiguous { .. }));
        assert_eq!(header_layout("Version: 3.19\nGitID: v3.19-2-g0123456\n"), Ok(HeaderLayout::Compact));
    }

    #[test]
    fn output_of_something_else_is_refused() {
        for output in ["", "criu 4.2", "Version: four", "Version: 4", "Version: .", "Version: 99999999999.1"]
        {
            assert_eq!(CriuVersion::parse(output), Err(VersionError::NoVersion), "{output}");
        }
    }

    #[test]
    fn versions_order_and_print() {
        let old = CriuVersion::parse("Version: 4.1.1").unwrap();
        assert!(old < CriuVersion::parse("Version: 4.2").unwrap());
        assert_eq!(old.to_string(), "4.1.1");
        assert_eq!(FIRST_WIDE.to_string(), "4.2");
    }
}
