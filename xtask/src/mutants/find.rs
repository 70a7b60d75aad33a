//! Finds what can be changed in a file.

use std::ops::Range;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Arm, Attribute, BinOp, Expr, Lit, Stmt, UnOp};

/// A place in the text of a file that can be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    /// What is there, in bytes of the text.
    pub(super) whole: Range<usize>,
    /// From 1.
    pub(super) line: usize,
    pub(super) what: What,
}

/// What is there, and what it can be changed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Two sides and what stands between them, which may be any of `others` instead.
    Operator {
        left: Range<usize>,
        operator: Range<usize>,
        right: Range<usize>,
        others: &'static [&'static str],
    },
    /// Something that is negated, and then is not.
    Not(Range<usize>),
    /// A truth value.
    Truth,
    /// A statement that can be left out.
    Statement,
}

impl What {
    /// In how many ways it can be changed.
    pub(super) fn ways(&self) -> usize {
        match self {
            What::Operator { others, .. } => others.len(),
            What::Not(_) | What::Truth | What::Statement => 1,
        }
    }
}

/// Everything in this file that can be changed, in its order. Constants, tests and what stands in macros are left
/// alone.
///
/// # Errors
/// The text is no Rust.
pub(super) fn sites(text: &str) -> syn::Result<Vec<Site>> {
    let mut finder = Finder { sites: Vec::new() };
    finder.visit_file(&syn::parse_file(text)?);
    finder.sites.sort_by_key(|site| (site.whole.start, std::cmp::Reverse(site.whole.end)));
    Ok(finder.sites)
}

struct Finder {
    sites: Vec<Site>,
}

impl Finder {
    fn add(&mut self, place: &impl Spanned, what: What) {
        let span = place.span();
        self.sites.push(Site { whole: span.byte_range(), line: span.start().line, what });
    }
}

impl<'a> Visit<'a> for Finder {
    fn visit_expr(&mut self, expr: &'a Expr) {
        // What a planted mistake of the simulator does instead is no decision.
        if let Expr::If(branch) = expr
            && asks_for_a_planted_mistake(&branch.cond)
        {
            if let Some((_, otherwise)) = &branch.else_branch {
                self.visit_expr(otherwise);
            }
            return;
        }
        match expr {
            Expr::Binary(binary) if !has_let(&binary.left) && !has_let(&binary.right) => {
                if let Some(others) = others(&binary.op) {
                    let left = binary.left.span().byte_range();
                    let operator = binary.op.span().byte_range();
                    let right = binary.right.span().byte_range();
                    self.add(expr, What::Operator { left, operator, right, others });
                }
            }
            Expr::Unary(unary) if matches!(unary.op, UnOp::Not(_)) => {
                self.add(expr, What::Not(unary.expr.span().byte_range()));
            }
            Expr::Lit(literal) if matches!(literal.lit, Lit::Bool(_)) => self.add(expr, What::Truth),
            _ => {}
        }
        visit::visit_expr(self, expr);
    }

    fn visit_arm(&mut self, arm: &'a Arm) {
        if !arm.guard.as_ref().is_some_and(|(_, guard)| asks_for_a_planted_mistake(guard)) {
            visit::visit_arm(self, arm);
        }
    }

    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        if let Stmt::Expr(expr, Some(_)) = stmt
            && is_effect(expr)
        {
            self.add(stmt, What::Statement);
        }
        visit::visit_stmt(self, stmt);
    }

    // Their values are needed when the program is compiled.
    fn visit_item_const(&mut self, _: &'a syn::ItemConst) {}
    fn visit_impl_item_const(&mut self, _: &'a syn::ImplItemConst) {}
    fn visit_item_static(&mut self, _: &'a syn::ItemStatic) {}
    fn visit_expr_const(&mut self, _: &'a syn::ExprConst) {}
    fn visit_type(&mut self, _: &'a syn::Type) {}
    fn visit_pat(&mut self, _: &'a syn::Pat) {}
    fn visit_attribute(&mut self, _: &'a Attribute) {}

    fn visit_item_fn(&mut self, item: &'a syn::ItemFn) {
        if item.sig.constness.is_none() && !is_for_tests(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'a syn::ImplItemFn) {
        if item.sig.constness.is_none() && !is_for_tests(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'a syn::ItemMod) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_impl(self, item);
        }
    }
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"))
    })
}

/// Whether it is a part of `if a && let ...`, whose `&&` is no operator.
fn has_let(expr: &Expr) -> bool {
    match expr {
        Expr::Let(_) => true,
        Expr::Binary(binary) => has_let(&binary.left) || has_let(&binary.right),
        _ => false,
    }
}

fn asks_for_a_planted_mistake(condition: &Expr) -> bool {
    match condition {
        Expr::Macro(it) => it.mac.path.is_ident("planted"),
        Expr::Binary(binary) => {
            asks_for_a_planted_mistake(&binary.left) || asks_for_a_planted_mistake(&binary.right)
        }
        Expr::Paren(inner) => asks_for_a_planted_mistake(&inner.expr),
        _ => false,
    }
}

fn others(operator: &BinOp) -> Option<&'static [&'static str]> {
    Some(match operator {
        BinOp::Eq(_) => &["!="],
        BinOp::Ne(_) => &["=="],
        BinOp::Lt(_) => &["<=", ">"],
        BinOp::Le(_) => &["<", ">"],
        BinOp::Gt(_) => &[">=", "<"],
        BinOp::Ge(_) => &[">", "<"],
        BinOp::And(_) => &["||"],
        BinOp::Or(_) => &["&&"],
        BinOp::Add(_) => &["-"],
        BinOp::Sub(_) => &["+"],
        _ => return None,
    })
}

/// Whether a statement is there for what it does: a call or an assignment. A planted mistake of the simulator is not
/// a decision.
fn is_effect(expr: &Expr) -> bool {
    match expr {
        Expr::Call(call) => !names_planted(&call.func),
        Expr::MethodCall(call) => call.method != "planted",
        Expr::Assign(_) => true,
        Expr::Binary(binary) => {
            matches!(
                binary.op,
                BinOp::AddAssign(_) | BinOp::SubAssign(_) | BinOp::BitOrAssign(_) | BinOp::BitAndAssign(_)
            )
        }
        _ => false,
    }
}

fn names_planted(expr: &Expr) -> bool {
    matches!(expr, Expr::Path(path) if path.path.segments.iter().any(|segment| segment.ident == "planted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found in the body of a function, with the number of changes.
    fn found(body: &str) -> Vec<(String, usize)> {
        let text = format!("fn f() {{\n{body}\n}}");
        let sites = sites(&text).unwrap();
        assert!(sites.iter().all(|site| site.line == 2));
        sites.into_iter().map(|site| (text[site.whole].to_owned(), site.what.ways())).collect()
    }

    fn expected(all: &[(&str, usize)]) -> Vec<(String, usize)> {
        all.iter().map(|(text, ways)| (text.to_string(), *ways)).collect()
    }

    #[test]
    fn operators_negations_truths_and_statements_are_found() {
        let conditions = expected(&[("!a && b != c", 1), ("!a", 1), ("b != c", 1)]);
        assert_eq!(found("if !a && b != c {}"), conditions);
        assert_eq!(found("let x = a + 1 < b;"), expected(&[("a + 1 < b", 2), ("a + 1", 1)]));
        assert_eq!(found("self.at = now;"), expected(&[("self.at = now;", 1)]));
        assert_eq!(found("out.push(true);"), expected(&[("out.push(true);", 1), ("true", 1)]));
    }

    #[test]
    fn what_is_no_decision_is_left_alone() {
        for body in [
            "if a && let Some(x) = b {}",
            "let x: Vec<u8> = f();",
            "const A: bool = true;",
            "match a { true => f, _ => g }",
            "let true = a else { return };",
            "planted(Mistake::Any);",
            "if planted!(self.bug, Any) || planted!(self.bug, Other) && !a { b(); }",
            "match a { b if planted!(self.bug, Any) => c(), _ => d }",
            "match a { b if planted!(self.bug, Any) => { c(); } _ => {} }",
            "assert!(a == b);",
        ] {
            assert_eq!(found(body), [], "{body}");
        }
        let tests = "#[cfg(test)]\nmod tests { fn f() { g(); } }\nconst fn h() -> bool { true }";
        assert_eq!(sites(tests).unwrap(), []);
    }
}
