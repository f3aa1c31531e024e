package commit

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"

	"github.com/varvefs/varve/image"
)

// maxChanges is the most bytes of all changes of one commit together.
const maxChanges = 1 << 20

// changeCommands are the instructions that change a config and need no build.
var changeCommands = []string{
	"cmd", "entrypoint", "env", "expose", "healthcheck", "label", "onbuild", "stopsignal", "user", "volume", "workdir",
}

// Changes are instructions of a Dockerfile to be applied to an image's config,
// as docker commit --change takes them. The zero Changes change nothing.
type Changes struct {
	nodes  []*parser.Node // not changed by applying them
	escape rune
}

// ParseChanges reads the values of --change: the instructions CMD, ENTRYPOINT,
// ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR.
// They are joined by newlines and read as one Dockerfile, so that an escape
// directive in the first holds for all, and a line may go on in the next.
func ParseChanges(lines []string) (Changes, error) {
	if len(lines) == 0 {
		return Changes{}, nil
	}
	text := strings.Join(lines, "\n")
	switch {
	case len(text) > maxChanges:
		return Changes{}, fmt.Errorf("changes of %d bytes, the limit is %d", len(text), maxChanges)
	case !utf8.ValidString(text) || strings.IndexByte(text, 0) >= 0:
		return Changes{}, errors.New("changes are not text in UTF-8")
	}
	file, err := parser.Parse(strings.NewReader(text))
	if err != nil {
		return Changes{}, fmt.Errorf("parse changes: %w", err)
	}
	for _, n := range file.AST.Children {
		if !slices.Contains(changeCommands, strings.ToLower(n.Value)) {
			return Changes{}, fmt.Errorf("%s is not a valid change command", n.Value)
		}
		if _, err := instructions.ParseCommand(n); err != nil {
			return Changes{}, fmt.Errorf("parse change %.80q: %w", n.Original, err)
		}
	}
	return Changes{nodes: file.AST.Children, escape: file.EscapeToken}, nil
}

// IsZero reports whether there is nothing to change.
func (c Changes) IsZero() bool { return len(c.nodes) == 0 }

// runConfig is what changes read and write of the "config" of an image.
type runConfig struct {
	User         string
	ExposedPorts map[string]json.RawMessage
	Env          []string
	Entrypoint   []string
	Cmd          []string
	Volumes      map[string]json.RawMessage
	WorkingDir   string
	Labels       map[string]string
	StopSignal   string
	Healthcheck  json.RawMessage
	OnBuild      []string
	Shell        []string
}

// health is docker's Healthcheck; zero means inherited.
type health struct {
	Test          []string      `json:",omitempty"`
	Interval      time.Duration `json:",omitempty"`
	Timeout       time.Duration `json:",omitempty"`
	StartPeriod   time.Duration `json:",omitempty"`
	StartInterval time.Duration `json:",omitempty"`
	Retries       int           `json:",omitempty"`
}

// apply gives the "config" of an image for os with the changes made: the fields
// that no instruction names keep their bytes.
func (c Changes) apply(raw json.RawMessage, os string) (json.RawMessage, error) {
	if c.IsZero() {
		return raw, nil
	}
	d := &dispatcher{os: os, lex: shell.NewLex(c.escape), touched: map[string]bool{}}
	if !isNull(raw) {
		for _, run := range []*runConfig{&d.base, &d.run} {
			if err := json.Unmarshal(raw, run); err != nil {
				return nil, fmt.Errorf("image config: %w", err)
			}
		}
	}
	for _, n := range c.nodes {
		cmd, err := instructions.ParseCommand(n)
		if err == nil {
			err = d.dispatch(cmd)
		}
		if err != nil {
			return nil, fmt.Errorf("change %.80q: %w", n.Original, err)
		}
	}
	if err := d.merge(); err != nil {
		return nil, err
	}
	return d.write(raw)
}

// dispatcher applies instructions as moby's builder does for a commit
// (daemon/builder/dockerfile/dispatchers.go).
type dispatcher struct {
	os        string
	lex       *shell.Lex
	base, run runConfig       // before and after
	touched   map[string]bool // fields of run that were set
	cmdSet    bool            // by an instruction before
	expanded  int             // bytes that variables made so far
	ports     int             // ports that ranges made so far
}

func (d *dispatcher) dispatch(cmd instructions.Command) error {
	if p, ok := cmd.(instructions.PlatformSpecific); ok {
		if err := p.CheckPlatform(d.os); err != nil {
			return err
		}
	}
	// What an instruction sets is seen from the next one on.
	env := d.run.Env
	envs := shell.EnvsFromSlice(env)
	if e, ok := cmd.(instructions.SupportsSingleWordExpansion); ok {
		err := e.Expand(func(word string) (string, error) {
			if err := d.bound(word, env); err != nil {
				return "", err
			}
			word, _, err := d.lex.ProcessWord(word, envs)
			if d.expanded += len(word); err == nil && d.expanded > image.MaxConfig {
				err = fmt.Errorf("variables make more than %d bytes of the changes", image.MaxConfig)
			}
			return word, err
		})
		if err != nil {
			return err
		}
	}
	run := &d.run
	switch c := cmd.(type) {
	case *instructions.CmdCommand:
		run.Cmd = d.commandLine(c.ShellDependantCmdLine)
		d.cmdSet = d.cmdSet || len(c.CmdLine) > 0
		d.touch("Cmd", "ArgsEscaped")
	case *instructions.EntrypointCommand:
		run.Entrypoint = d.commandLine(c.ShellDependantCmdLine)
		if !d.cmdSet {
			run.Cmd = nil // those were arguments of another program
		}
		d.touch("Entrypoint", "Cmd", "ArgsEscaped")
	case *instructions.EnvCommand:
		for _, kv := range c.Env {
			run.Env = setEnv(run.Env, kv.Key, kv.Value)
		}
		d.touch("Env")
	case *instructions.ExposeCommand:
		d.touch("ExposedPorts")
		return d.expose(c.Ports, env, envs)
	case *instructions.HealthCheckCommand:
		run.Healthcheck = encodeJSON(health(*c.Health))
		d.touch("Healthcheck")
	case *instructions.LabelCommand:
		if run.Labels == nil {
			run.Labels = map[string]string{}
		}
		for _, kv := range c.Labels {
			run.Labels[kv.Key] = kv.Value
		}
		d.touch("Labels")
	case *instructions.OnbuildCommand:
		run.OnBuild = append(run.OnBuild, c.Expression)
		d.touch("OnBuild")
	case *instructions.StopSignalCommand:
		run.StopSignal = c.Signal
		d.touch("StopSignal")
		return checkSignal(c.Signal)
	case *instructions.UserCommand:
		run.User = c.User
		d.touch("User")
	case *instructions.VolumeCommand:
		if run.Volumes == nil {
			run.Volumes = map[string]json.RawMessage{}
		}
		for _, v := range c.Volumes {
			if v == "" {
				return errors.New("VOLUME specified can not be an empty string")
			}
			if run.Volumes[v] == nil {
				run.Volumes[v] = json.RawMessage("{}")
			}
		}
		d.touch("Volumes")
	case *instructions.WorkdirCommand:
		switch {
		case c.Path == "":
			return errors.New("the directory is empty")
		case path.IsAbs(c.Path):
			run.WorkingDir = path.Clean(c.Path)
		default:
			run.WorkingDir = path.Join("/", run.WorkingDir, c.Path)
		}
		d.touch("WorkingDir")
	default:
		return fmt.Errorf("%s is not a valid change command", cmd.Name())
	}
	return nil
}

func (d *dispatcher) touch(names ...string) {
	for _, n := range names {
		d.touched[n] = true
	}
}

// commandLine puts the shell before a command that is not in the form of a
// JSON list.
func (d *dispatcher) commandLine(c instructions.ShellDependantCmdLine) []string {
	switch {
	case !c.PrependShell || c.CmdLine == nil:
		return c.CmdLine
	case len(d.run.Shell) > 0:
		return slices.Concat(d.run.Shell, c.CmdLine)
	case d.os == "windows":
		return slices.Concat([]string{"cmd", "/S", "/C"}, c.CmdLine)
	}
	return slices.Concat([]string{"/bin/sh", "-c"}, c.CmdLine)
}

func setEnv(env []string, key, value string) []string {
	env = slices.Clone(env)
	i := slices.IndexFunc(env, func(e string) bool {
		k, _, _ := strings.Cut(e, "=")
		return k == key
	})
	if i < 0 {
		return append(env, key+"="+value)
	}
	env[i] = key + "=" + value
	return env
}

// replacement is ${name/pattern/text} and ${name//pattern/text}, which may put
// a value in the place of each byte of another.
var replacement = regexp.MustCompile(`\$\{[^}]*/`)

// bound refuses a word that could expand to more than a config may have, before
// it does: each variable doubled by the next one is a gigabyte after 30 lines.
func (d *dispatcher) bound(word string, env []string) error {
	longest := len(word)
	for _, e := range env {
		if key, _, _ := strings.Cut(e, "="); strings.Contains(word, key) {
			longest = max(longest, len(e))
		}
	}
	most := float64(len(word)) + float64(strings.Count(word, "$"))*float64(longest)
	for range replacement.FindAllStringIndex(word, 8) {
		most *= float64(longest)
	}
	// A bound on replacements lies far above what they make.
	limit := float64(image.MaxConfig)
	if replacement.MatchString(word) {
		limit *= 64
	}
	if most > limit {
		return fmt.Errorf("%.40q could expand to more than %d bytes", word, image.MaxConfig)
	}
	return nil
}

// merge fills in from the config before what the changes left empty, as moby
// does once they are made (daemon/commit.go): so neither CMD [] nor ENTRYPOINT []
// takes away what the image has, and a HEALTHCHECK keeps the intervals that it
// does not name.
func (d *dispatcher) merge() error {
	if d.run.User == "" {
		d.run.User = d.base.User
	}
	if len(d.run.Entrypoint) == 0 {
		if len(d.run.Cmd) == 0 {
			d.run.Cmd = d.base.Cmd
		}
		if d.run.Entrypoint == nil {
			d.run.Entrypoint = d.base.Entrypoint
		}
	}
	if !d.touched["Healthcheck"] || isNull(d.base.Healthcheck) {
		return nil
	}
	var was, now health
	if err := json.Unmarshal(d.base.Healthcheck, &was); err != nil {
		return fmt.Errorf("image config: Healthcheck: %w", err)
	}
	if err := json.Unmarshal(d.run.Healthcheck, &now); err != nil {
		return fmt.Errorf("HEALTHCHECK: %w", err)
	}
	if len(now.Test) == 0 {
		now.Test = was.Test
	}
	for _, f := range []struct{ now, was *time.Duration }{
		{&now.Interval, &was.Interval}, {&now.Timeout, &was.Timeout},
		{&now.StartPeriod, &was.StartPeriod}, {&now.StartInterval, &was.StartInterval},
	} {
		if *f.now == 0 {
			*f.now = *f.was
		}
	}
	if now.Retries == 0 {
		now.Retries = was.Retries
	}
	d.run.Healthcheck = encodeJSON(now)
	return nil
}

// write puts the touched fields into the config; an empty one is left out, as
// docker and OCI have it.
func (d *dispatcher) write(raw json.RawMessage) (json.RawMessage, error) {
	o, err := parseObject(raw)
	if err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	run := &d.run
	for _, f := range []struct {
		name  string
		value any
		empty bool
	}{
		{"User", run.User, run.User == ""},
		{"ExposedPorts", run.ExposedPorts, len(run.ExposedPorts) == 0},
		{"Env", run.Env, len(run.Env) == 0},
		{"Entrypoint", run.Entrypoint, len(run.Entrypoint) == 0},
		{"Cmd", run.Cmd, len(run.Cmd) == 0},
		{"Volumes", run.Volumes, len(run.Volumes) == 0},
		{"WorkingDir", run.WorkingDir, run.WorkingDir == ""},
		{"Labels", run.Labels, len(run.Labels) == 0},
		{"StopSignal", run.StopSignal, run.StopSignal == ""},
		// Of Windows: it says that Cmd or Entrypoint, now replaced, was one string.
		{"ArgsEscaped", nil, true},
		{"Healthcheck", run.Healthcheck, len(run.Healthcheck) == 0},
		{"OnBuild", run.OnBuild, len(run.OnBuild) == 0},
	} {
		switch {
		case !d.touched[f.name]:
		case f.empty:
			o.drop(f.name)
		default:
			o.set(f.name, f.value)
		}
	}
	return o.bytes(), nil
}
