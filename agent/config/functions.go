package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/function"
)

// value evaluates what was given. A flag's text is no expression.
func (g given) value(h host) (cty.Value, hcl.Diagnostics) {
	if g.attr == nil {
		return cty.StringVal(g.literal), nil
	}
	return g.attr.Expr.Value(evalContext(h, filepath.Dir(g.attr.Range.Filename)))
}

// evalContext is what expressions of a file in dir can use.
func evalContext(h host, dir string) *hcl.EvalContext {
	return &hcl.EvalContext{Functions: map[string]function.Function{
		"env":       envFunc(h),
		"file":      fileFunc(h, dir),
		"hostname":  hostnameFunc(h),
		"trimspace": trimspaceFunc,
	}}
}

// envFunc: env("X") is the environment variable X, an error if that is not
// set; env("X", "default") is never an error. Set but empty counts as set.
func envFunc(h host) function.Function {
	return function.New(&function.Spec{
		Params:   []function.Parameter{{Name: "name", Type: cty.String}},
		VarParam: &function.Parameter{Name: "default", Type: cty.String},
		Type:     function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			if len(args) > 2 {
				return cty.NilVal, errors.New("takes a name and at most one default")
			}
			name := args[0].AsString()
			if v, ok := h.env(name); ok {
				if !utf8.ValidString(v) {
					return cty.NilVal, fmt.Errorf("environment variable %s is not UTF-8", name)
				}
				return cty.StringVal(v), nil
			}
			if len(args) == 2 {
				return args[1], nil
			}
			return cty.NilVal, fmt.Errorf("environment variable %s is not set; for a default, write env(%q, \"...\")", name, name)
		},
	})
}

// fileFunc: file("x") is the content of a file. A relative path starts at the
// configuration file that says it, wherever the node was started.
func fileFunc(h host, dir string) function.Function {
	return function.New(&function.Spec{
		Params: []function.Parameter{{Name: "path", Type: cty.String}},
		Type:   function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			path := args[0].AsString()
			if !filepath.IsAbs(path) {
				path = filepath.Join(dir, path)
			}
			b, err := h.readFile(path)
			if err != nil {
				return cty.NilVal, fmt.Errorf("read %s: %w", path, err)
			}
			if !utf8.Valid(b) {
				return cty.NilVal, fmt.Errorf("%s is not UTF-8", path)
			}
			return cty.StringVal(string(b)), nil
		},
	})
}

func hostnameFunc(h host) function.Function {
	return function.New(&function.Spec{
		Type: function.StaticReturnType(cty.String),
		Impl: func([]cty.Value, cty.Type) (cty.Value, error) {
			name, err := h.hostname()
			if err != nil {
				return cty.NilVal, fmt.Errorf("ask for the host's name: %w", err)
			}
			return cty.StringVal(name), nil
		},
	})
}

// trimspaceFunc is for files that end in a newline.
var trimspaceFunc = function.New(&function.Spec{
	Params: []function.Parameter{{Name: "text", Type: cty.String}},
	Type:   function.StaticReturnType(cty.String),
	Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
		return cty.StringVal(strings.TrimSpace(args[0].AsString())), nil
	},
})
