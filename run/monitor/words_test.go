package monitor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeys(t *testing.T) {
	for in, want := range map[string]string{"": "\x10\x11", "none": "", "ctrl-a": "\x01", "Ctrl-@,x": "\x00x", "ctrl-_": "\x1f", "a,b,c": "abc"} {
		if got, err := parseKeys(in); err != nil || string(got) != want {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"ctrl-", "ctrl-1", "ctrl-aa", "ab", ",", "ctrl-p,", " "} {
		if got, err := parseKeys(in); err == nil {
			t.Errorf("%q was taken for %q", in, got)
		}
	}
	for _, c := range []struct {
		keys   string
		typed  []string
		sent   string
		detach bool
	}{
		{"\x10\x11", []string{"ab"}, "ab", false},
		{"\x10\x11", []string{"a\x10\x11b"}, "a", true},
		{"\x10\x11", []string{"a\x10", "\x11"}, "a", true},
		{"\x10\x11", []string{"\x10", "b"}, "\x10b", false},
		{"\x10\x11", []string{"\x10\x10\x11"}, "\x10", true},
		{"\x10\x11", []string{"\x11\x10"}, "\x11", false},
		{"\x01", []string{"ab\x01c"}, "ab", true},
		{"", []string{"a\x10\x11b"}, "a\x10\x11b", false},
	} {
		k := keyScanner{keys: []byte(c.keys)}
		var sent strings.Builder
		detach := false
		for _, typed := range c.typed {
			var out []byte
			out, detach = k.scan([]byte(typed))
			sent.Write(out)
		}
		if sent.String() != c.sent || detach != c.detach {
			t.Errorf("%q with %q: sent %q, %v; want %q, %v", c.typed, c.keys, sent.String(), detach, c.sent, c.detach)
		}
	}
}

// The messages of runtimes that are not here: newer crun and older runc.
func TestNotStarted(t *testing.T) {
	for _, c := range []struct {
		said, name string
		code       int
		want       string
	}{
		{"executable file `foo` not found in $PATH: No such file or directory", "foo", 127, `exec: "foo": executable file not found in $PATH`},
		{"exec container process `/bin/x`: Exec format error", "/bin/x", 126, `exec: "/bin/x": exec format error`},
		{"exec container process (missing dynamic library?) `/bin/x`: No such file or directory", "/bin/x", 126, `exec: "/bin/x": no such file or directory`},
		{"open executable: Permission denied", "/x", 126, `exec: "/x": permission denied`},
		{"open executable: Operation not permitted", "/etc", 126, `exec: "/etc": permission denied`},
		{`container_linux.go:380: starting container process caused: exec: "foo": executable file not found in $PATH`, "foo", 127, `exec: "foo": executable file not found in $PATH`},
		{`runc create failed: unable to start container process: error during container init: exec: "/etc": is a directory`, "/etc", 126, `exec: "/etc": is a directory`},
		{`exec failed: unable to start container process: chdir to cwd ("/no") set in config.json failed: no such file or directory`, "x", 127, `chdir to cwd ("/no") set in config.json failed: no such file or directory`},
		{"runc create failed: unable to start container process: error mounting \"/x\" to rootfs: no such file or directory", "x", 125, `error mounting "/x" to rootfs: no such file or directory`},
		{"", "x", 125, "it broke"},
	} {
		log := filepath.Join(t.TempDir(), "log")
		if c.said != "" {
			must(t, os.WriteFile(log, encodeJSON(0, map[string]string{"level": "error", "msg": c.said})[5:], 0o600))
		}
		if got := notStarted(errors.New("it broke"), log, []string{c.name}); got.Code != c.code || got.Message != c.want {
			t.Errorf("%s\n got %d %s\nwant %d %s", c.said, got.Code, got.Message, c.code, c.want)
		}
	}
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	good := Config{RuntimeRoot: "/r", Socket: "/s"}
	good.Container.ID, good.Container.Dir, good.Container.Root = "a-1", dir, "/root"
	must(t, Write(good))
	if got, err := Read(dir); err != nil || got.Container.ID != "a-1" || got.Socket != "/s" {
		t.Errorf("read %+v, %v", got, err)
	}
	for name, spoil := range map[string]func(c *Config){
		"ID":     func(c *Config) { c.Container.ID = "../x" },
		"no ID":  func(c *Config) { c.Container.ID = "" },
		"socket": func(c *Config) { c.Socket = "/" + strings.Repeat("s", 100) },
		"root":   func(c *Config) { c.Container.Root = "here" },
	} {
		bad := good
		spoil(&bad)
		if err := Write(bad); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, configFile), []byte(`{"Socket"`), 0o600))
	if _, err := Read(dir); err == nil {
		t.Error("half a config was taken")
	}
}
