//! Commands of the operator at phase boundaries: `--hook PHASE=COMMAND`.

use std::process::Command;
use std::str::FromStr;

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPhase {
    /// Source: everything is ready, the tasks are about to be frozen.
    PreFreeze,
    /// Source: the tasks are frozen and dumped; for example take the service address away.
    PostDump,
    /// Destination: the images are there; for example bring the service address up.
    PreRestore,
    /// Destination: the tasks are restored and held before their first instruction.
    PostRestore,
    /// Either: the move is over and the source has let go.
    Released,
    /// Either: the move was called off; undo what earlier hooks did.
    RolledBack,
}

impl HookPhase {
    const ALL: [(Self, &'static str); 6] = [
        (Self::PreFreeze, "pre-freeze"),
        (Self::PostDump, "post-dump"),
        (Self::PreRestore, "pre-restore"),
        (Self::PostRestore, "post-restore"),
        (Self::Released, "released"),
        (Self::RolledBack, "rolled-back"),
    ];

    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(phase, _)| *phase == self).map_or("", |(_, name)| name)
    }
}

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// When.
    pub phase: HookPhase,
    /// What, for `sh -c`.
    pub command: String,
}

impl FromStr for Hook {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || HookPhase::ALL.map(|(_, name)| name).join(", ");
        let (phase, command) = text
            .split_once('=')
            .ok_or_else(|| format!("a hook is PHASE=COMMAND, with one of the phases {}", names()))?;
        let phase = HookPhase::ALL
            .iter()
            .find(|(_, name)| *name == phase)
            .map(|(phase, _)| *phase)
            .ok_or_else(|| format!("unknown phase {phase:?}; there are {}", names()))?;
        Ok(Self { phase, command: command.to_owned() })
    }
}

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
#[error("hook {phase} failed ({how}): {command}")]
pub struct HookError {
    phase: &'static str,
    command: String,
    how: String,
}

/// The hooks of one side, and what they are told in their environment.
#[derive(Clone, Debug, Default)]
pub struct Hooks {
    hooks: Vec<Hook>,
    environment: Vec<(&'static str, String)>,
}

impl Hooks {
    /// The hooks as given on the command line.
    #[must_use]
    pub const fn new(hooks: Vec<Hook>) -> Self {
        Self { hooks, environment: Vec::new() }
    }

    /// Adds a variable to the environment of every later hook.
    pub fn tell(&mut self, name: &'static str, value: impl ToString) {
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value.to_string()));
    }

    /// Whether any hook wants `phase`.
    #[must_use]
    pub fn wants(&self, phase: HookPhase) -> bool {
        self.hooks.iter().any(|hook| hook.phase == phase)
    }

    /// Runs the hooks of `phase` in order, each in `sh -c`, and stops at the first that fails.
    ///
    /// # Errors
    /// [`HookError`].
    pub fn run(&self, phase: HookPhase) -> Result<(), HookError> {
        for hook in self.hooks.iter().filter(|hook| hook.phase == phase) {
            let status = Command::new("sh")
                .args(["-c", &hook.command])
                .env("POSTCOPY_PHASE", phase.name())
                .envs(self.environment.iter().map(|(name, value)| (name, value)))
                .status();
            let how = match status {
                Ok(status) if status.success() => continue,
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            return Err(HookError { phase: phase.name(), command: hook.command.clone(), how });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_phase_and_command() {
        let hook: Hook = "post-dump=ip addr del a=b".parse().unwrap();
        assert_eq!(hook, Hook { phase: HookPhase::PostDump, command: "ip addr del a=b".into() });
        assert!("post-dump".parse::<Hook>().unwrap_err().contains("PHASE=COMMAND"));
        assert!("later=true".parse::<Hook>().unwrap_err().contains("pre-freeze"));
    }

    #[test]
    fn runs_in_order_with_environment_and_stops_at_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let hook = |command: &str| Hook { phase: HookPhase::Released, command: command.into() };
        let write = format!("echo $POSTCOPY_PHASE $POSTCOPY_PID >> {}", out.display());
        let mut hooks = Hooks::new(vec![hook(&write), hook("exit 3"), hook(&write)]);
        hooks.tell("POSTCOPY_PID", 1);
        hooks.tell("POSTCOPY_PID", 42);
        let error = hooks.run(HookPhase::Released).unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert_eq!(std::fs::read_to_string(out).unwrap(), "released 42\n");
        assert!(hooks.run(HookPhase::PreFreeze).is_ok());
    }
}
