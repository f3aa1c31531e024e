package commit

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/image"
)

// applied applies changes to the "config" of an image for linux.
func applied(config string, changes ...string) (string, error) {
	c, err := ParseChanges(changes)
	if err != nil {
		return "", err
	}
	b, err := c.apply(json.RawMessage(config), "linux")
	return string(b), err
}

// What docker's own integration test of commit --change asserts
// (moby, integration-cli/docker_cli_commit_test.go, TestCommitChange).
func TestChangesAsDockersOwnTest(t *testing.T) {
	got, err := applied(`{"Cmd":["true"]}`,
		"EXPOSE 8080", "ENV DEBUG true", "ENV test 1", "ENV PATH /foo", "LABEL foo bar", `CMD ["/bin/sh"]`, "WORKDIR /opt",
		`ENTRYPOINT ["/bin/sh"]`, "USER testuser", "VOLUME /var/lib/docker", "ONBUILD /usr/local/bin/python-build --dir /app/src")
	if err != nil {
		t.Fatal(err)
	}
	want := `{"Cmd":["/bin/sh"],"User":"testuser","ExposedPorts":{"8080/tcp":{}},"Env":["DEBUG=true","test=1","PATH=/foo"],` +
		`"Entrypoint":["/bin/sh"],"Volumes":{"/var/lib/docker":{}},"WorkingDir":"/opt","Labels":{"foo":"bar"},` +
		`"OnBuild":["/usr/local/bin/python-build --dir /app/src"]}`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestChanges(t *testing.T) {
	const full = `{"Env":["PATH=/bin","A=one"],"Cmd":["old","arg"],"Entrypoint":["entry"],"WorkingDir":"/was","Labels":{"k":"v"}}`
	for _, tt := range []struct {
		name, config string
		changes      []string
		want         string
	}{
		{"nothing", ` { "Env" : null } `, nil, ` { "Env" : null } `},
		{"no config", ``, []string{"USER u"}, `{"User":"u"}`},
		{"null", `null`, []string{"USER u"}, `{"User":"u"}`},

		{"CMD list", `{"Cmd":["a"]}`, []string{`CMD ["b", "c d"]`}, `{"Cmd":["b","c d"]}`},
		{"CMD shell", `{}`, []string{`CMD echo $HOME "x y"`}, `{"Cmd":["/bin/sh","-c","echo $HOME \"x y\""]}`},
		{"CMD in the image's shell", `{"Shell":["/bin/bash","-ec"]}`, []string{`CMD run`}, `{"Shell":["/bin/bash","-ec"],"Cmd":["/bin/bash","-ec","run"]}`},
		{"CMD keeps ENTRYPOINT", full, []string{`CMD ["b"]`}, `{"Env":["PATH=/bin","A=one"],"Cmd":["b"],"Entrypoint":["entry"],"WorkingDir":"/was","Labels":{"k":"v"}}`},
		{"CMD takes ArgsEscaped away", `{"ArgsEscaped":true,"Cmd":["a"]}`, []string{`CMD ["b"]`}, `{"Cmd":["b"]}`},
		{"CMD is not expanded", `{"Env":["A=one"]}`, []string{`CMD ["$A"]`}, `{"Env":["A=one"],"Cmd":["$A"]}`},
		{"empty CMD, no ENTRYPOINT", `{"Cmd":["a"]}`, []string{`CMD []`}, `{"Cmd":["a"]}`},
		{"empty CMD under ENTRYPOINT", `{"Cmd":["a"],"Entrypoint":["e"]}`, []string{`CMD []`}, `{"Entrypoint":["e"]}`},
		{"HTML stays", `{}`, []string{`CMD ["a<b>&c"]`}, `{"Cmd":["a<b>&c"]}`},

		{"ENTRYPOINT clears CMD", `{"Cmd":["a"],"User":"u"}`, []string{`ENTRYPOINT ["e"]`}, `{"User":"u","Entrypoint":["e"]}`},
		{"ENTRYPOINT after CMD", `{"Cmd":["a"]}`, []string{`CMD ["b"]`, `ENTRYPOINT ["e"]`}, `{"Cmd":["b"],"Entrypoint":["e"]}`},
		{"ENTRYPOINT before CMD", `{"Cmd":["a"]}`, []string{`ENTRYPOINT ["e"]`, `CMD ["b"]`}, `{"Cmd":["b"],"Entrypoint":["e"]}`},
		{"ENTRYPOINT shell", `{}`, []string{`ENTRYPOINT exec top -b`}, `{"Entrypoint":["/bin/sh","-c","exec top -b"]}`},
		{"empty ENTRYPOINT", `{"Cmd":["a"],"Entrypoint":["e"]}`, []string{`ENTRYPOINT []`}, `{"Cmd":["a"],"Entrypoint":["e"]}`},
		{"ENTRYPOINT of nothing", `{"Cmd":["a"],"Entrypoint":["e"]}`, []string{`ENTRYPOINT [""]`}, `{"Entrypoint":[""]}`},

		{"ENV replaces in place", `{"Env":["A=1","B=2"]}`, []string{`ENV A=3`}, `{"Env":["A=3","B=2"]}`},
		{"ENV appends", `{"Env":["A=1"]}`, []string{`ENV B=2 C="3 4"`, `ENV D five six`}, `{"Env":["A=1","B=2","C=3 4","D=five six"]}`},
		{"ENV expands the image's", `{"Env":["PATH=/bin"]}`, []string{`ENV PATH=/opt/bin:$PATH`}, `{"Env":["PATH=/opt/bin:/bin"]}`},
		{"ENV expands what was before the line", `{"Env":["abc=hello"]}`, []string{`ENV abc=bye def=$abc`, `ENV ghi=$abc`}, `{"Env":["abc=bye","def=hello","ghi=bye"]}`},
		{"ENV modifiers", `{"Env":["A=1"]}`, []string{`ENV B=${A:-x} C=${X:-x} D=${A:+x} E=\$A F='$A'`}, `{"Env":["A=1","B=1","C=x","D=x","E=$A","F=$A"]}`},
		{"ENV of unset", `{}`, []string{`ENV B=a${NONE}b`}, `{"Env":["B=ab"]}`},
		{"ENV keys differ in case", `{"Env":["a=1"]}`, []string{`ENV A=2`}, `{"Env":["a=1","A=2"]}`},

		{"EXPOSE", `{"ExposedPorts":{"80/tcp":{}}}`, []string{`EXPOSE 53/udp 443`}, `{"ExposedPorts":{"443/tcp":{},"53/udp":{},"80/tcp":{}}}`},
		{"EXPOSE range", `{}`, []string{`EXPOSE 9000-9002/TCP 7/sctp`}, `{"ExposedPorts":{"7/sctp":{},"9000/tcp":{},"9001/tcp":{},"9002/tcp":{}}}`},
		{"EXPOSE words of a variable", `{"Env":["P=80 443/udp"]}`, []string{`EXPOSE $P`}, `{"Env":["P=80 443/udp"],"ExposedPorts":{"443/udp":{},"80/tcp":{}}}`},
		{"EXPOSE as run -p", `{}`, []string{`EXPOSE 127.0.0.1:8080:80 [::1]:81:81 90-92:90`}, `{"ExposedPorts":{"80/tcp":{},"81/tcp":{},"90/tcp":{}}}`},

		{"HEALTHCHECK", `{}`, []string{`HEALTHCHECK --interval=5s --timeout=1m --start-period=2s --start-interval=1s --retries=4 CMD ["a","b"]`},
			`{"Healthcheck":{"Test":["CMD","a","b"],"Interval":5000000000,"Timeout":60000000000,"StartPeriod":2000000000,"StartInterval":1000000000,"Retries":4}}`},
		{"HEALTHCHECK shell", `{}`, []string{`HEALTHCHECK CMD curl -f x || exit 1`}, `{"Healthcheck":{"Test":["CMD-SHELL","curl -f x || exit 1"]}}`},
		{"HEALTHCHECK inherits", `{"Healthcheck":{"Test":["CMD","old"],"Interval":7,"Retries":3}}`, []string{`HEALTHCHECK --retries=9 CMD ["new"]`},
			`{"Healthcheck":{"Test":["CMD","new"],"Interval":7,"Retries":9}}`},
		{"HEALTHCHECK NONE", `{"Healthcheck":{"Test":["CMD","old"],"Timeout":7}}`, []string{`HEALTHCHECK NONE`}, `{"Healthcheck":{"Test":["NONE"],"Timeout":7}}`},

		{"LABEL merges", `{"Labels":{"some":"label","keep":"1"}}`, []string{`LABEL some=label2 "a b"=c`}, `{"Labels":{"a b":"c","keep":"1","some":"label2"}}`},
		{"LABEL expands", `{"Env":["V=1.2"]}`, []string{`LABEL version=$V`}, `{"Env":["V=1.2"],"Labels":{"version":"1.2"}}`},

		{"ONBUILD appends", `{"OnBuild":["RUN a"]}`, []string{`ONBUILD RUN b $X`, `onbuild ADD . /`}, `{"OnBuild":["RUN a","RUN b $X","ADD . /"]}`},

		{"STOPSIGNAL", `{"StopSignal":"SIGTERM"}`, []string{`STOPSIGNAL SIGQUIT`}, `{"StopSignal":"SIGQUIT"}`},
		{"STOPSIGNAL as it is", `{"Env":["S=rtmin+3"]}`, []string{`STOPSIGNAL $S`}, `{"Env":["S=rtmin+3"],"StopSignal":"rtmin+3"}`},
		{"STOPSIGNAL number", `{}`, []string{`STOPSIGNAL 9`}, `{"StopSignal":"9"}`},

		{"USER", `{"User":"root"}`, []string{`USER 1000:1000`}, `{"User":"1000:1000"}`},
		{"USER of nothing", `{"User":"root"}`, []string{`USER $NONE`}, `{"User":"root"}`},

		{"VOLUME merges", `{"Volumes":{"/a":{}}}`, []string{`VOLUME /b /c`, `VOLUME ["/d e"]`}, `{"Volumes":{"/a":{},"/b":{},"/c":{},"/d e":{}}}`},

		{"WORKDIR", `{"WorkingDir":"/was"}`, []string{`WORKDIR /is/./x/..`}, `{"WorkingDir":"/is"}`},
		{"WORKDIR joins", `{"WorkingDir":"/was"}`, []string{`WORKDIR is`, `WORKDIR ../too`}, `{"WorkingDir":"/was/too"}`},
		{"WORKDIR from nothing", `{}`, []string{`WORKDIR a`}, `{"WorkingDir":"/a"}`},
		{"WORKDIR expands", `{"Env":["HOME=/root"]}`, []string{`WORKDIR $HOME/x`}, `{"Env":["HOME=/root"],"WorkingDir":"/root/x"}`},

		{"case, comments, continued lines", `{}`, []string{"user a", "# a comment", "ENV A=1 \\", "  B=2"}, `{"User":"a","Env":["A=1","B=2"]}`},
		{"escape directive", `{}`, []string{"# escape=`", "ENV A=1 `", "  B=`$x"}, `{"Env":["A=1","B=$x"]}`},
		{"what is unknown stays", `{"Hostname" : "h" ,"X":{ "<" : 1e3 },"Env":[],"Image":null}`, []string{`ENV A=1`}, `{"Hostname":"h","X":{ "<" : 1e3 },"Env":["A=1"],"Image":null}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := applied(tt.config, tt.changes...)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// Changes are read once and may be applied to many images.
func TestChangesApplyAgain(t *testing.T) {
	c, err := ParseChanges([]string{"ENV B=$A", "EXPOSE $P", "LABEL x=$A"})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"1", "2", "1"} {
		got, err := c.apply(json.RawMessage(`{"Env":["A=`+a+`","P=8`+a+`"]}`), "linux")
		if want := `{"Env":["A=` + a + `","P=8` + a + `","B=` + a + `"],"ExposedPorts":{"8` + a + `/tcp":{}},"Labels":{"x":"` + a + `"}}`; err != nil || string(got) != want {
			t.Errorf("%s, %v", got, err)
		}
	}
}

func TestChangesForWindows(t *testing.T) {
	c, err := ParseChanges([]string{`CMD dir`})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.apply(nil, "windows"); err != nil || string(got) != `{"Cmd":["cmd","/S","/C","dir"]}` {
		t.Errorf("%s, %v", got, err)
	}
}

func TestChangesRefuse(t *testing.T) {
	for _, tt := range []struct {
		changes []string
		want    string
	}{
		{[]string{"RUN x"}, "RUN is not a valid change command"},
		{[]string{"user u", "From scratch"}, "From is not a valid change command"},
		{[]string{"SHELL [\"x\"]"}, "SHELL is not a valid change command"},
		{[]string{"MAINTAINER x"}, "MAINTAINER is not a valid change command"},
		{[]string{"ARG x"}, "ARG is not a valid change command"},
		{[]string{"COPY a b"}, "COPY is not a valid change command"},
		{[]string{"nonsense"}, "nonsense is not a valid change command"},
		{[]string{""}, "no instructions"},
		{[]string{"# only this"}, "no instructions"},
		{[]string{"ENV"}, "ENV"},
		{[]string{"ENV A"}, "ENV"},
		{[]string{"ENV =x"}, "ENV"},
		{[]string{"LABEL"}, "LABEL"},
		{[]string{"USER"}, "USER requires exactly one argument"},
		{[]string{"WORKDIR"}, "WORKDIR requires exactly one argument"},
		{[]string{"WORKDIR $NONE"}, "empty"},
		{[]string{"VOLUME"}, "VOLUME"},
		{[]string{"VOLUME $NONE"}, "VOLUME specified can not be an empty string"},
		{[]string{"EXPOSE"}, "EXPOSE"},
		{[]string{"EXPOSE 80/icmp"}, "unknown protocol"},
		{[]string{"EXPOSE 65536"}, "invalid container port"},
		{[]string{"EXPOSE 90-80"}, "invalid container port"},
		{[]string{"EXPOSE x"}, "invalid container port"},
		{[]string{"EXPOSE 1-3:1-2"}, "invalid host port"},
		{[]string{"EXPOSE a.b:1:2"}, "invalid address"},
		{[]string{"EXPOSE 0-65535 0-65535 0-65535 0-65535 1"}, "more than"},
		{[]string{"STOPSIGNAL SIGNOTHING"}, "invalid signal"},
		{[]string{"STOPSIGNAL 0"}, "invalid signal"},
		{[]string{"STOPSIGNAL 65"}, "invalid signal"},
		{[]string{"STOPSIGNAL RTMAX-15"}, "invalid signal"},
		{[]string{"HEALTHCHECK NONE x"}, "takes no arguments"},
		{[]string{"HEALTHCHECK CMD"}, "Missing command"},
		{[]string{"HEALTHCHECK x"}, "Unknown type"},
		{[]string{"HEALTHCHECK --interval=1us CMD x"}, "cannot be less than"},
		{[]string{"HEALTHCHECK --retries=-1 CMD x"}, "cannot be negative"},
		{[]string{"ONBUILD ONBUILD RUN x"}, "Chaining ONBUILD"},
		{[]string{"ONBUILD FROM x"}, "isn't allowed as an ONBUILD trigger"},
		{[]string{"ENV A=${"}, "ENV A=${"},
		{[]string{"USER a\x00b"}, "not text"},
		{[]string{"USER \xff"}, "not text"},
		{[]string{strings.Repeat("x", maxChanges+1)}, "the limit is"},
	} {
		if got, err := applied(`{}`, tt.changes...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.60q: %q, %v, want %q", tt.changes, got, err, tt.want)
		}
	}
	for _, config := range []string{`{"Env":1}`, `[]`, `{"Labels":["a"]}`, `{"Env":[1]}`} {
		if got, err := applied(config, "ENV a=b"); err == nil {
			t.Errorf("%s: %s", config, got)
		}
	}
	if got, err := applied(`{"Healthcheck":"x"}`, "HEALTHCHECK NONE"); err == nil {
		t.Error(got)
	}
	// What no change names is nobody's business.
	if _, err := applied(`{"Healthcheck":"x"}`, "USER u"); err != nil {
		t.Error(err)
	}
}

// Thirty lines that double a value each are refused before they are a gigabyte.
func TestChangesAreBounded(t *testing.T) {
	double := []string{"ENV A=" + strings.Repeat("x", 1000)}
	for range 40 {
		double = append(double, "ENV A=$A$A")
	}
	for name, changes := range map[string][]string{
		"doubled":  double,
		"product":  {"ENV A=" + strings.Repeat("x", 20000), "ENV B=${A//x/$A}", "ENV C=${B//x/$B}"},
		"repeated": {"ENV A=" + strings.Repeat("x", 30000), "LABEL x=" + strings.Repeat("$A", 10000)},
		"in sum":   {"ENV A=" + strings.Repeat("x", 30000), strings.Repeat("LABEL x="+strings.Repeat("$A", 100)+"\n", 100)},
		"ports":    {"ENV A=\"" + strings.Repeat("1 ", 15000) + "\"", "EXPOSE " + strings.Repeat("$A", 10000)},
	} {
		if got, err := applied(`{}`, changes...); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	got, err := applied(`{"Env":["A=/a/b","V=1.2.3"]}`, `ENV B=${A/a/c} C=${V//./_}${V//./-}`)
	if err != nil || got != `{"Env":["A=/a/b","V=1.2.3","B=/c/b","C=1_2_31-2-3"]}` {
		t.Errorf("%s, %v", got, err)
	}
}

func FuzzParseChanges(f *testing.F) {
	for _, s := range []string{
		"EXPOSE 8080 $P", "ENV DEBUG true", "ENV A=${A:-x} B=\"$A\"", "LABEL foo bar", `CMD ["/bin/sh"]`, "WORKDIR opt", `ENTRYPOINT top`,
		"USER $U", "VOLUME [\"/x\"]", "ONBUILD RUN <<E\nx\nE", "HEALTHCHECK --interval=1s CMD x", "STOPSIGNAL RTMIN+3", "# escape=`\nENV a=b`\n c=d",
		"ENV A=${B//x/$C}", "#syntax=x\nUSER a", "LABEL \xff=\x00",
	} {
		f.Add(s)
	}
	const base = `{"architecture":"amd64","os":"linux","config":{"Env":["A=/a b","B=xx"],"Cmd":["c"],"Healthcheck":{"Test":["NONE"]},"WorkingDir":"/w"},"rootfs":{"type":"layers","diff_ids":[]}}`
	b := testBase(f, false, base)
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseChanges([]string{s})
		if err != nil {
			return
		}
		m, config, err := Image(b, []byte(base), nil, Meta{Changes: c})
		if err != nil {
			return
		}
		checkImage(t, m, config)
		again, _, err := Image(b, []byte(base), nil, Meta{Changes: c})
		if err != nil || again.Digest != m.Digest {
			t.Errorf("another image the second time: %v", err)
		}
		if len(config) > image.MaxConfig {
			t.Errorf("%d bytes", len(config))
		}
	})
}
